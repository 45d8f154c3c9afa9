"""A Prefect server for more than one person: PostgreSQL behind it, and a store that speaks S3 beside it."""
