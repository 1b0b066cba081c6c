"""The operators' pages under ``/operate``: what runs, why, and the ways to change it.

Each module makes one page of the navigation from what other modules know; its template has the same name.
"""

from deploy.pages import audit, learning, live, now, releases, rollout, signals
from deploy.pages.rendering import failed

__all__ = ["PREFIX", "ROUTERS", "failed"]

PREFIX = "/operate"
ROUTERS = tuple(page.router for page in (now, releases, rollout, learning, signals, audit, live))
