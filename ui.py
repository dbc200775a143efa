"""The page: several concept LoRAs and a prompt, in a browser. `lora-compose ui` starts it, or `streamlit run ui.py`."""

import webbrowser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import streamlit as st
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_compose.compose.page.launch import SCREEN
from lora_compose.compose.support.network import url_of


@dataclass(frozen=True)
class NoFrames:
    """Forbids other websites to show the page in a frame, where a visitor would click on it without seeing it."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Adds the headers to every response."""

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = "frame-ancestors 'self'"
                headers["X-Frame-Options"] = "SAMEORIGIN"
            await send(message)

        await self.app(scope, receive, answer)


@asynccontextmanager
async def opened(_: st.App) -> AsyncIterator[None]:
    """Opens a browser, as Streamlit does for scripts but not for applications; the port listens already."""
    if not st.get_option("server.headless"):
        host = st.get_option("server.address")
        every = host in ("0.0.0.0", "::")  # where a server may listen, but no browser can go
        webbrowser.open(url_of("localhost" if every else host, st.get_option("server.port")))
    yield


app = st.App(SCREEN, middleware=[Middleware(NoFrames)], lifespan=opened)
