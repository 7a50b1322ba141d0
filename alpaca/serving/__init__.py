"""The engine that answers requests, and the OpenAPI schema that Cog publishes for it."""
