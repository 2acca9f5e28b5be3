"""The local trainer service: really trains and really serves, on this machine, over HTTP.

`launch` starts it as a child process; `python -m fwasync.local` runs it by hand. Importing this package
is light: numpy and the server are imported in the service's own process.
"""

from fwasync.local.child import LocalService, LocalServiceError, launch

__all__ = ("LocalService", "LocalServiceError", "launch")
