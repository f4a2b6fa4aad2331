"""``/pic/*``: what a server can do and holds, and the commands to its cache.

``watch`` only looks, ``compile`` makes segments ahead of their first use,
``explain`` foretells a link, ``report`` says what one did, ``segments`` is about what is there,
``store`` saves it, ``linking`` turns it all off.
"""

from __future__ import annotations

from fastapi import APIRouter, FastAPI

from sglang_pic.server.routes import (
    compile,
    explain,
    linking,
    report,
    segments,
    store,
    watch,
)

router = APIRouter(
    routes=[
        *watch.router.routes,
        *compile.router.routes,
        *explain.router.routes,
        *report.router.routes,
        *segments.router.routes,
        *linking.router.routes,
        *store.router.routes,
    ]
)


def install(app: FastAPI) -> None:
    """Add the routes to SGLang's application.

    One by one: SGLang looks for an endpoint's ``auth_level`` among the application's
    own routes, and finds none behind ``include_router``.
    """
    app.router.routes.extend(router.routes)
