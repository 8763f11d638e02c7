-- The first schema
-- depends:

-- migrate: apply

-- Every row that belongs to a user carries user_id and is looked up with it (S10).

create table users (
    id bigint generated always as identity primary key,
    name text not null unique,
    email text not null default '',
    created_at timestamptz not null default now(),
    disabled_at timestamptz
);

create table api_keys (
    id bigint generated always as identity primary key,
    user_id bigint not null references users,
    name text not null default '',
    scope text not null check (scope in ('admin', 'user')),
    prefix text not null unique,             -- shown in lists; finds the row
    hash bytea not null,                     -- SHA-256 of the whole key (S9)
    created_at timestamptz not null default now(),
    revoked_at timestamptz
);

create table delivery_servers (
    id bigint generated always as identity primary key,
    user_id bigint not null references users,
    name text not null,
    host text not null,
    port int not null,
    security text not null check (security in ('none', 'starttls', 'tls')),
    connect_timeout_seconds double precision not null default 10,
    username text not null default '',
    password_sealed bytea not null default '',   -- AES-256-GCM, row id as associated data (S11)
    link_domain text not null default '',
    open_domain text not null default '',
    mfrom text not null default '',
    enforced_from text not null default '',
    use_list_sender_as_mfrom boolean not null default false,
    use_list_sender_as_from boolean not null default false,
    limits jsonb not null default '{}',          -- domain.egress.DeliveryServerLimits
    enabled boolean not null default true,
    version int not null default 1,
    created_at timestamptz not null default now(),
    deleted_at timestamptz
);
create unique index delivery_servers_name on delivery_servers (user_id, name) where deleted_at is null;

-- One row: raised by every change of delivery_servers, so an engine asks one number whether to look again.
create table egress_version (version bigint not null);
insert into egress_version values (1);

create table lists (
    id bigint generated always as identity primary key,
    user_id bigint not null references users,
    name text not null,
    sender_name text not null default '',
    sender_email text not null default '',
    created_at timestamptz not null default now(),
    deleted_at timestamptz
);
create unique index lists_name on lists (user_id, name) where deleted_at is null;

create table custom_fields (
    id bigint generated always as identity primary key,
    user_id bigint not null references users,
    list_id bigint not null references lists,
    name text not null,
    kind text not null default 'text' check (kind in ('text', 'number', 'date', 'list')),
    created_at timestamptz not null default now(),
    unique (list_id, name)
);

create table subscribers (
    id bigint generated always as identity primary key,
    user_id bigint not null,
    list_id bigint not null references lists,
    email text not null,                     -- as given, domain in lower case
    email_key text not null,                 -- domain.address.key: what makes two spellings one address
    data json not null default '{}',         -- custom field name -> value; json, not jsonb: stored and forwarded as text
    state text not null default 'subscribed' check (state in ('subscribed', 'unsubscribed', 'bounced')),
    subscription_ip inet,
    subscribed_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    unique (list_id, email_key)
);

create table imports (
    id bigint generated always as identity primary key,
    user_id bigint not null references users,
    list_id bigint not null references lists,
    state text not null default 'running' check (state in ('running', 'completed', 'failed')),
    failure text not null default '',
    rows bigint not null default 0,
    imported bigint not null default 0,      -- new subscribers
    updated bigint not null default 0,       -- already on the list, fields replaced
    refused bigint not null default 0,
    created_at timestamptz not null default now(),
    finished_at timestamptz
);

create table import_refusals (
    import_id bigint not null references imports on delete cascade,
    row bigint not null,                     -- row 1 is the first row after the header
    field text not null,
    reason text not null,
    primary key (import_id, row)
);

-- An address that must not be mailed. user_id null: the whole system; list_id null: all lists of the user.
-- A removed row stays with removed_at set, so that engines which follow `changed` see the removal too.
create table suppressions (
    id bigint generated always as identity primary key,
    user_id bigint references users,
    list_id bigint references lists,
    email_key text not null,
    reason text not null check (reason in ('manual', 'import', 'unsubscribed', 'bounced', 'complained')),
    note text not null default '',
    created_at timestamptz not null default now(),
    removed_at timestamptz,
    changed xid8 not null default pg_current_xact_id()   -- engines read what changed since their last snapshot's xmin
);
create unique index suppressions_address on suppressions (coalesce(user_id, 0), coalesce(list_id, 0), email_key);
create index suppressions_changed on suppressions (changed);

create table campaigns (
    id bigint generated always as identity primary key,
    user_id bigint not null references users,
    name text not null,
    state text not null default 'draft',     -- domain.states.CAMPAIGN_STATES
    mail_class text not null default 'marketing' check (mail_class in ('transactional', 'autoresponder', 'marketing')),
    list_id bigint not null references lists,
    delivery_server_id bigint not null references delivery_servers,
    subject text not null,
    from_name text not null default '',
    from_email text not null default '',
    reply_to text not null default '',
    html text not null default '',
    text text not null default '',
    recipients bigint not null default 0,    -- counted when they are numbered
    batches int not null default 0,
    version int not null default 1,
    created_at timestamptz not null default now(),
    started_at timestamptz,
    prepared_at timestamptz,                 -- its recipients are numbered
    finished_at timestamptz
);
create index campaigns_user on campaigns (user_id, id);
create index campaigns_active on campaigns (id) where state in ('preparing', 'running', 'paused', 'cancelling');

-- The four large tables have one partition per campaign, so dropping an old campaign is a DROP TABLE.

-- Written once when the campaign is started, never updated: the numbered recipients with their merge data as it stood then.
create table recipients (
    campaign_id bigint not null,
    number int not null,
    subscriber_id bigint not null,
    email text not null,
    data json not null,
    primary key (campaign_id, number)
) partition by list (campaign_id);

-- What changes while a campaign is sent: one small row per batch. A first-attempt batch is a range of numbers, a later one
-- lists them. Bit i of `done` is its i-th recipient; all ones = settled.
create table batches (
    campaign_id bigint not null,
    batch int not null,
    attempt smallint not null default 1,
    first_number int not null,
    last_number int not null,
    numbers int[],                           -- null: first_number..last_number
    state text not null default 'pending' check (state in ('pending', 'queued', 'settled')),
    queued_at timestamptz,                   -- first announced; the Date of its messages
    announced_at timestamptz,                -- last announced
    first_attempt_at timestamptz,
    owner text,                              -- engines.id of the lease's holder
    epoch int not null default 0,            -- raised by every grant
    lease_until timestamptz,
    done varbit not null,
    primary key (campaign_id, batch)
) partition by list (campaign_id);
create index batches_open on batches (campaign_id, state, batch) where state <> 'settled';

-- Deferred recipients: inserted with their `t` record, deleted when the feeder puts them in a batch.
create table retries (
    campaign_id bigint not null,
    number int not null,
    attempt smallint not null,               -- of the try that is due
    due_at timestamptz not null,
    first_attempt_at timestamptz not null,
    primary key (campaign_id, number)
) partition by list (campaign_id);
create index retries_due on retries (campaign_id, due_at);

-- Insert-only: every accounting record. Terminal kinds: d b x s c; t and u are not.
create table accounting (
    campaign_id bigint not null,
    number int not null,
    attempt smallint not null,
    kind "char" not null,
    at timestamptz not null,
    batch int not null,
    delivery_server_id bigint not null,
    connection int not null,
    size int not null,
    status text not null,
    category text not null,
    diagnostic text not null,
    mta text not null,
    recipient text not null
) partition by list (campaign_id);
-- a few kilobytes per million rows; finds one recipient's records without reading the campaign's
create index accounting_number on accounting using brin (number) with (autosummarize = on);  -- else only VACUUM lets it find new rows

-- Totals per campaign, one row per journal that reported to it, so engines never wait for each other.
create table campaign_totals (
    campaign_id bigint not null references campaigns on delete cascade,
    journal text not null,
    delivered bigint not null default 0,
    bounced bigint not null default 0,
    expired bigint not null default 0,
    suppressed bigint not null default 0,
    cancelled bigint not null default 0,
    deferrals bigint not null default 0,
    uncertain bigint not null default 0,
    primary key (campaign_id, journal)
);

-- How far the ledger has read each journal; moved in the transaction that writes what was read (exactly once).
create table journal_cursors (
    journal text primary key,                -- engines.id
    segment bigint not null default 0,
    position bigint not null default 0,
    updated_at timestamptz not null default now()
);

create table engines (
    id text primary key,                     -- node.slot.start time: never used twice
    node text not null,
    pid int not null,
    journal_directory text not null,
    started_at timestamptz not null default now(),
    seen_at timestamptz not null default now(),
    stopped_at timestamptz
);

-- Mail taken for our return-path domains, kept raw before the 250 (P11).
create table inbound_messages (
    id bigint generated always as identity primary key,
    received_at timestamptz not null default now(),
    peer inet,
    mail_from text not null,
    recipient text not null,
    user_id bigint references users,         -- whose return path it was, when its token verifies
    campaign_id bigint,
    number int,
    raw bytea not null
);

-- Answers to POSTs with an Idempotency-Key.
create table idempotency_keys (
    user_id bigint not null references users,
    key text not null,
    request_hash bytea not null,
    status int,                              -- null: still being worked on
    response bytea,
    created_at timestamptz not null default now(),
    primary key (user_id, key)
);

-- migrate: rollback
-- None: the schema only goes forward. A release that has to go back restores the backup made before it.
