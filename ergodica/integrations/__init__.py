"""Bridges to other libraries; each module imports the one that it bridges to."""
