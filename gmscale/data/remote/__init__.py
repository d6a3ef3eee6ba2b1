"""Shards at http(s):// and s3:// addresses, with a bounded cache of copies."""
