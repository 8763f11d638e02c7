-- What came back: how each received message was read, what was done, bounces and complaints as events
-- depends: 0004_custom_headers

-- migrate: apply

alter table inbound_messages
    add column kind text not null default '',      -- what it was read as; '' until then
    add column outcome text not null default '',   -- what was done: a word of domain.feedback.OUTCOMES
    add column reason text not null default '',    -- why that, in words
    add column reading jsonb,                      -- what it says (inbound.summary.Summary)
    add column handled_at timestamptz;             -- null: waits to be read
create index inbound_messages_waiting on inbound_messages (id) where handled_at is null;
create index inbound_messages_user on inbound_messages (user_id, id);
create index inbound_messages_handled on inbound_messages (handled_at) where handled_at is not null;

-- One row for one thing that somebody reported about one sent message; the same report again adds none.
create table feedback (
    id bigint generated always as identity primary key,
    at timestamptz not null default now(),
    kind text not null check (kind in ('rb', 'rs', 'f', 'u')),   -- bounce report, other status report, complaint, unsubscribe
    action text not null,                          -- rb failed; rs delayed, delivered; f its Feedback-Type
    user_id bigint not null references users,
    campaign_id bigint not null references campaigns on delete cascade,
    number int not null,
    recipient text not null,
    effect text not null,                          -- hard, soft, sender, content, complained, unsubscribed, none
    status text not null default '',
    category text not null default '',
    diagnostic text not null default '',
    mta text not null default '',
    format text not null default '',
    details jsonb not null default '{}',           -- what else the accounting files show
    inbound_id bigint,                             -- the message it was read from
    node text not null default '',                 -- whose accounting files it belongs to; '' = it is in them
    unique (campaign_id, number, kind, action)
);
create index feedback_user on feedback (user_id, id);
create index feedback_to_write on feedback (node, id) where node <> '';

-- Refused while being sent: filled by the ledger, emptied by whoever draws the consequences.
create table refusals (
    id bigint generated always as identity primary key,
    like accounting including defaults
);

-- Soft bounces of an address since it was delivered to last; as many as the threshold make it a hard one.
create table soft_bounces (
    user_id bigint not null references users,
    email_key text not null,
    campaigns bigint[] not null,
    bounced_at timestamptz[] not null,
    primary key (user_id, email_key)
);

-- What came back for a campaign, in recipients.
create table campaign_feedback (
    campaign_id bigint primary key references campaigns on delete cascade,
    hard bigint not null default 0,
    soft bigint not null default 0,
    remote_bounces bigint not null default 0,      -- bounced by a report, after they were accepted
    complaints bigint not null default 0,
    unsubscribes bigint not null default 0,
    sender_faults bigint not null default 0,       -- refused for who sends: authentication, reputation, rate
    faults_at_pause bigint not null default 0,     -- sender_faults and outcomes when it was paused for them last
    outcomes_at_pause bigint not null default 0
);

alter table campaigns add column pause_reason text not null default '';   -- why Sluice paused it by itself

create table inbound_totals (
    day date not null,
    kind text not null,
    outcome text not null,
    messages bigint not null,
    primary key (day, kind, outcome)
);

-- A few pages per million rows: numbers follow the ids of subscribers
create index recipients_subscriber on recipients using brin (subscriber_id);

-- migrate: rollback
-- None: the schema only goes forward. A release that has to go back restores the backup made before it.
