"""Where a session's processes find each other: the Redis ledger decides, ModelExpress describes.

The ledger (`ledger`) assigns epochs and versions, holds the one decision of each push, lists members and their leases.
ModelExpress (`modelexpress`) carries what is needed to write into an engine: agent metadata, addresses, layout.
"""
