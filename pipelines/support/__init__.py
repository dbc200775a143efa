"""Small helpers without a model: names in messages, warnings, files at untrusted paths, the hub."""
