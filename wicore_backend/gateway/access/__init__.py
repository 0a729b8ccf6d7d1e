"""Who may use the gateway, and on what terms: API keys, and the identity that a request gets from its key."""
