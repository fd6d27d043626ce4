"""The service `adverts`: owns its data, and publishes it."""
