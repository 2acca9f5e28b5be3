"""The front door to the network, and the only room that speaks HTTP.

Inside: requests to one service (`client`), when to try again (`retry`, pure), what an answer means as an error
(`faults`), how a result is waited for (`retrieve`), and the session that a service keeps for us (`session`).

Below them, what carries a request (`carrier`): our own connections (`pool`, `connection` and `incoming`, opened by
`dial`; `heads` and `inflate`, pure, are what goes out and what comes in), or any httpx transport (`foreign`).
"""
