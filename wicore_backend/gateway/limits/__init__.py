"""How much may be asked for: rates of requests and tokens, sizes, times, connections."""
