"""The embedded stack: real parts from wheels, run by supervisord, under one directory."""
