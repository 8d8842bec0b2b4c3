"""The commands of ``normfree``, one a file: what a person types, sees and gets."""
