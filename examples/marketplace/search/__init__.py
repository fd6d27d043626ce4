"""The service `search`: answers from its own copy of adverts and users."""
