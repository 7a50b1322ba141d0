"""OpenAI's /v1, the page, metrics and a view of a running training, beside Cog's server."""
