"""The engine that answers requests, and the schema Cog publishes for it."""
