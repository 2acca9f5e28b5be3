"""The wire: every field name and every encoding of the trainer API, and no I/O.

Client and local service share this package, so that a field is spelled in one place. Reading is tolerant
(unknown fields are ignored, `null` is the same as absent), writing is frugal (a field that was not set is not
sent): services of different ages differ in exactly that.
"""
