"""The error that every format raises; apart, so that formats and registry can both import it."""


class ExportError(ValueError):
    """The animation cannot be written there or in that format. The message is one line that says why."""
