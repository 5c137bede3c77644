"""`lmconnector doctor`: looks at everything between an engine and its cache, and says what to do."""
