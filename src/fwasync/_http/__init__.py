"""The front door to the network, and the only importer of the HTTP library.

Inside: the connection (`client`), when to try again (`retry`, pure), what an answer means as an error
(`faults`), how a result is waited for (`retrieve`), and the session that a service keeps for us (`session`).
"""
