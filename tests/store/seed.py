"""A user, a delivery server, a list with subscribers and a campaign, put straight into the tables for tests that need them."""

import json

from store.postgres import Pool


async def campaign(
    pool: Pool, *, recipients: int = 1000, state: str = "preparing", host: str = "127.0.0.1", port: int = 25,
    limits: dict[str, object] | None = None, subject: str = "Hello", text: str = "Hello {{ subscriber.first_name }}", html: str = "",
    domain: str = "people.example",
) -> int:  # fmt: skip
    """Make everything a campaign needs and the campaign itself; returns its id. Subscribers are p1@…, p2@…, ..."""
    user = await pool.fetchval("insert into users (name) values ('u' || (select count(*) from users)) returning id")
    server = await pool.fetchval(
        "insert into delivery_servers (user_id, name, host, port, security, mfrom, limits) "
        "values ($1, 'relay', $2, $3, 'none', 'bounces.sender.example', $4::text::jsonb) returning id",
        user,
        host,
        port,
        json.dumps(limits or {}),
    )
    await pool.execute("update egress_version set version = version + 1")
    mailing_list = await pool.fetchval("insert into lists (user_id, name) values ($1, 'readers') returning id", user)
    await pool.execute(
        "insert into subscribers (user_id, list_id, email, email_key, data) "
        "select $1, $2, 'p' || n || '@' || $4, 'p' || n || '@' || $4, json_build_object('first_name', 'Ada ' || n) "
        "from generate_series(1, $3::int) n",
        user,
        mailing_list,
        recipients,
        domain,
    )
    return int(
        await pool.fetchval(
            "insert into campaigns (user_id, name, state, list_id, delivery_server_id, subject, from_email, text, html, started_at) "
            "values ($1, 'letter', $2, $3, $4, $5, 'news@sender.example', $6, $7, now()) returning id",
            user,
            state,
            mailing_list,
            server,
            subject,
            text,
            html,
        )
    )
