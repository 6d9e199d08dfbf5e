"""The model hub: listing, verified download, and the local store."""
