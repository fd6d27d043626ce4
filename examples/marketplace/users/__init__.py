"""The service `users`: owns its data, and publishes it."""
