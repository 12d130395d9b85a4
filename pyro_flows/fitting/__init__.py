"""From a Pyro model to a judged posterior."""
