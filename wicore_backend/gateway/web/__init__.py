"""The chat page at `/` and the dashboard at `/dashboard`: static files, served with the headers that confine them."""

from wicore_backend.gateway.web.pages import CONTENT_SECURITY_POLICY, add_pages

__all__ = ["CONTENT_SECURITY_POLICY", "add_pages"]
