"""What answers over HTTP. Uses the engine and what it tells listeners, nothing deeper."""
