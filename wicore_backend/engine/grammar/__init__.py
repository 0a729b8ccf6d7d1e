"""Answers that are valid by construction: a grammar says which tokens may come next, and no other is ever chosen.

`spec` is what a request asks for, `source` and `json_schema` turn it into what llguidance compiles, `compiler` does so
within bounds, and `progress` follows each answer and gives the sampler its masks.
"""
