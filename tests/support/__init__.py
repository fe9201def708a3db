"""Models, programs, peers and waits that several tests use; nothing here is a test."""
