"""`lmconnector bench`: how fast the cache is on this machine, beside what it can't be faster than."""
