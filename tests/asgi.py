"""A request to the serving application in this process, without a socket."""

import asyncio
import json

from moesparse.serving.app import make_app


def ask(served, path, **body):
    """Status and body of an answer, by the ASGI protocol."""
    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    content = json.dumps({"model": served.name} | body).encode()
    sent = []

    async def talk():
        done, asked = asyncio.Event(), iter([{"type": "http.request", "body": content}])

        async def receive():
            message = next(asked, None)
            if message is None:
                await done.wait()
            return message or {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        await make_app(served)(scope, receive, send)
        done.set()

    asyncio.run(talk())
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]).decode()
