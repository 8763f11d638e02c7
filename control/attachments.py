"""Attachments of a draft: uploaded as they are, one request each, and shown without their content."""

from typing import Annotated, Any

from litestar import Controller, Request, delete, get, post
from litestar.di import NamedDependency
from litestar.params import QueryParameter

from compose import mime
from control.campaigns import check_content
from control.guards import Caller
from control.imports import bounded
from control.parameters import Id
from control.services import Services
from domain.campaign import Attachment
from domain.errors import Invalid
from store import attachments, campaigns
from store.attachments import AttachmentInfo
from store.postgres import connection, transaction


class AttachmentController(Controller):
    """The files that go with every message of a campaign."""

    path = "/campaigns/{campaign_id:int}/attachments"
    tags = ("campaigns",)

    @post("/", operation_id="addAttachment", summary="Attach a file to a draft", request_max_body_size=None)
    async def add(
        self,
        request: Request[Any, Any, Any],
        campaign_id: Id,
        caller: NamedDependency[Caller],
        services: NamedDependency[Services],
        filename: Annotated[str, QueryParameter(description="The name that recipients see.")],
        content_id: Annotated[
            str, QueryParameter(description='For `<img src="cid:...">` in the HTML part; empty: an ordinary attachment.')
        ] = "",
    ) -> AttachmentInfo:
        """The body is the file itself, `Content-Type` its media type. All of a campaign may have `mail.max_attachment_bytes` together."""
        kind = request.headers.get("content-type", "application/octet-stream").split(";")[0].strip().lower()
        most = services.settings.mail.max_attachment_bytes
        mime.check([Attachment(filename=filename, content_type=kind, content=b"", content_id=content_id)])  # before the file arrives
        pieces, size = [], 0
        async for block in bounded(request.stream(), "nothing was attached"):
            pieces.append(block)
            size += len(block)
            if size > most:
                raise Invalid("attachments", f"is larger than {most} bytes (mail.max_attachment_bytes)", filename)
        file = Attachment(filename=filename, content_type=kind, content=b"".join(pieces), content_id=content_id)
        return await attach(services, caller.sees, campaign_id, file)

    @get("/", operation_id="listAttachments", summary="The attachments of a campaign")
    async def page(self, campaign_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> list[AttachmentInfo]:
        """In the order in which they were added, without their content."""
        async with connection(services.pool) as conn:
            await campaigns.get(conn, caller.sees, campaign_id)
            return await attachments.listed(conn, campaign_id)

    @delete("/{attachment_id:int}", operation_id="removeAttachment", summary="Take an attachment from a draft")
    async def remove(
        self, campaign_id: Id, attachment_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]
    ) -> None:
        """A campaign that was started keeps what it has."""
        async with transaction(services.pool) as conn:
            await campaigns.get(conn, caller.sees, campaign_id)
            await attachments.remove(conn, campaign_id, attachment_id)


async def attach(services: Services, sees: int | None, campaign_id: int, file: Attachment) -> AttachmentInfo:
    """Add `file` to a draft that `sees` may see. Raises NotFound, Conflict, Invalid naming the field."""
    async with transaction(services.pool) as conn:
        campaign = await campaigns.get(conn, sees, campaign_id)
        mime.check([file])
        added = await attachments.add(conn, campaign_id, file, services.settings.mail.max_attachment_bytes)
        await check_content(conn, services, campaign)
    return added
