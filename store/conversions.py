"""Conversions (requirements 101-107): what trackers report about clicks of ours, and what a user calls the parameters."""

from decimal import Decimal

import msgspec

from store.postgres import Pool, PooledConnection, connection


class S2sSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a user's tracker speaks. `unit` and `channel` stand where a postback names none."""

    parameter: str = "click_id"
    value_parameter: str = "value"
    unit: str = ""
    channel: str = ""


class Conversion(msgspec.Struct, frozen=True, kw_only=True):
    """One postback about one recipient's click. The same `transaction` again is the same conversion."""

    campaign_id: int
    number: int
    value: Decimal
    unit: str
    channel: str
    transaction: str


class ChannelReport(msgspec.Struct, frozen=True, kw_only=True):
    """Conversions of one channel in one unit; `converters` are recipients, `value` is the sum."""

    channel: str
    unit: str
    conversions: int
    converters: int
    value: float


class ConversionReport(msgspec.Struct, frozen=True, kw_only=True):
    """Conversions of one campaign."""

    conversions: int
    converters: int
    channels: list[ChannelReport]


async def settings_of(conn: PooledConnection, user_id: int) -> S2sSettings:
    """The user's own, or the defaults."""
    row = await conn.fetchrow("select parameter, value_parameter, unit, channel from s2s_settings where user_id = $1", user_id)
    return S2sSettings(**dict(row)) if row else S2sSettings()


async def set_settings(conn: PooledConnection, user_id: int, settings: S2sSettings) -> None:
    """Replace them."""
    await conn.execute(
        "insert into s2s_settings (user_id, parameter, value_parameter, unit, channel) values ($1, $2, $3, $4, $5) on conflict (user_id) "
        "do update set parameter = excluded.parameter, value_parameter = excluded.value_parameter, unit = excluded.unit, "
        "channel = excluded.channel",
        user_id,
        settings.parameter,
        settings.value_parameter,
        settings.unit,
        settings.channel,
    )


async def click_parameter(pool: Pool, user_id: int, campaign_id: int, *, timeout_seconds: float) -> str:
    """What the click id is called in links of this campaign; "" where it wants none. Raises Unavailable."""
    async with connection(pool, timeout_seconds=timeout_seconds) as conn:
        found = await conn.fetchval(
            "select coalesce(s.parameter, 'click_id') from campaigns c left join s2s_settings s on s.user_id = c.user_id "
            "where c.id = $1 and c.user_id = $2 and c.track_conversions",
            campaign_id,
            user_id,
            timeout=timeout_seconds,
        )
    return str(found or "")


async def record(
    conn: PooledConnection, user_id: int, conversion: Conversion, *, timeout_seconds: float, at: float | None = None
) -> bool | None:
    """Keep it; it came at `at` (POSIX seconds; None: now).

    True: new; False: known; None: there is no such campaign of this user.
    """
    known = await conn.fetchval("select true from campaigns where id = $1 and user_id = $2", conversion.campaign_id, user_id)
    if not known:
        return None
    done = await conn.execute(
        "insert into conversions (campaign_id, number, value, unit, channel, transaction, at) "
        "values ($1, $2, $3, $4, $5, $6, coalesce(to_timestamp($7::float8), now())) "
        "on conflict do nothing",
        conversion.campaign_id,
        conversion.number,
        conversion.value,
        conversion.unit,
        conversion.channel,
        conversion.transaction,
        at,
        timeout=timeout_seconds,
    )
    return done == "INSERT 0 1"


async def report(conn: PooledConnection, campaign_id: int) -> ConversionReport:
    """Per channel and unit. The caller has looked the campaign up with the user."""
    rows = await conn.fetch(
        "select channel, unit, count(*) as conversions, count(distinct number) as converters, sum(value)::float8 as value "
        "from conversions where campaign_id = $1 group by channel, unit order by channel, unit",
        campaign_id,
    )
    people = await conn.fetchval("select count(distinct number) from conversions where campaign_id = $1", campaign_id)
    channels = [ChannelReport(**dict(row)) for row in rows]
    return ConversionReport(conversions=sum(each.conversions for each in channels), converters=people, channels=channels)
