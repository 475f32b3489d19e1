"""Real peers: proxies, clients and collectors, installed by the tests that need them."""
