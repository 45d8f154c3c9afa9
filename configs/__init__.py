"""Ready runs that ship with the package."""
