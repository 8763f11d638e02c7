-- Direct messages: streams that share one set of partitions, and what their messages say
-- depends: 0006_forwarding_mailboxes

-- migrate: apply

-- A stream is a campaign to which recipients keep coming: one per user, delivery server, mail class, list and month.
alter table campaigns
    alter column list_id drop not null,
    add column stream_month date,            -- null: an ordinary campaign
    add constraint campaigns_list check (list_id is not null or stream_month is not null);
create unique index campaigns_stream on campaigns (user_id, delivery_server_id, mail_class, coalesce(list_id, 0), stream_month)
    where stream_month is not null and state not in ('cancelling', 'cancelled');

-- What messages say; equal contents of a stream share a row. A part is to a stream what its content is to a campaign.
create table message_parts (
    part bigint generated always as identity primary key,
    campaign_id bigint not null references campaigns on delete cascade,
    digest bytea not null,                   -- SHA-256 of the content
    content json not null,                   -- store.messages.Part
    unique (campaign_id, digest)
);

-- One row per call: which numbers of its stream are its recipients.
create table messages (
    id bigint generated always as identity primary key,
    user_id bigint not null references users,
    campaign_id bigint not null references campaigns on delete cascade,
    part bigint not null references message_parts on delete cascade,
    name text not null default '',
    first_number int not null,
    last_number int not null,
    metadata json not null default '{}',
    created_at timestamptz not null default now(),
    unique (campaign_id, first_number)
);
create index messages_user on messages (user_id, id);

alter table batches add column part bigint not null default 0;   -- 0: the campaign's own content

-- migrate: rollback
-- None: the schema only goes forward. A release that has to go back restores the backup made before it.
