"""From a word to a thing on this disk: the registry, https, the Hub, the cache."""
