"""What became of a campaign: progress while it runs, outcomes by reason, and each recipient's attempts."""

from litestar import Controller, get
from litestar.di import NamedDependency
from litestar.params import FromPath

from control.guards import Caller
from control.parameters import Id
from control.services import Services
from store import accounting, campaigns
from store.postgres import connection


class ReportController(Controller):
    """Read only."""

    path = "/campaigns/{campaign_id:int}"
    tags = ("reports",)

    @get("/progress", operation_id="getProgress", summary="Progress of a campaign")
    async def progress(self, campaign_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> campaigns.Progress:
        """Cheap enough to ask every second. The rate is over the last minute in which somebody asked."""
        async with connection(services.pool) as conn:
            found = await campaigns.progress(conn, caller.sees, campaign_id)
        return services.rates.with_rate(found)

    @get("/report", operation_id="getReport", summary="Outcomes of a campaign by reason")
    async def report(self, campaign_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> accounting.Report:
        """Counts every accounting record of the campaign: a second or so per million."""
        async with connection(services.pool) as conn:
            await campaigns.get(conn, caller.sees, campaign_id)
        return await accounting.report(services.pool, campaign_id)

    @get("/recipients/{recipient:str}", operation_id="getRecipient", summary="One recipient and every attempt")
    async def recipient(
        self, campaign_id: Id, recipient: FromPath[str], caller: NamedDependency[Caller], services: NamedDependency[Services]
    ) -> campaigns.RecipientStatus:
        """By number in the campaign, or by address."""
        number = int(recipient) if recipient.isascii() and recipient.isdigit() and len(recipient) < 10 else None
        async with connection(services.pool) as conn:
            await campaigns.get(conn, caller.sees, campaign_id)
            return await campaigns.recipient(conn, campaign_id, number, "" if number is not None else recipient)
