"""What a process tells of itself: metrics for Prometheus, traces by OpenTelemetry, a log without people's words."""
