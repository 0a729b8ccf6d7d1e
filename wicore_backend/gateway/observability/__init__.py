"""What the gateway shows of itself: metrics, traces, and one log line for each request."""
