-- Forwarding of received mail, and what was fetched from mailboxes
-- depends: 0005_feedback

-- migrate: apply

-- One row: the rules of the whole system.
create table forwarding (
    singleton boolean primary key default true check (singleton),
    aliases text not null default '',            -- pattern:target, one per line, first match wins
    forward_to text not null default '',         -- who gets abuse@, postmaster@, root@
    abuse_to text not null default '',           -- who gets complaints; never shown to anybody who writes to us
    delivery_server_id bigint references delivery_servers,   -- the way out; null: the first that is enabled
    updated_at timestamptz not null default now()
);

-- Mail to send on: written with the mail itself, in one transaction.
create table forwards (
    id bigint generated always as identity primary key,
    inbound_id bigint not null,                  -- inbound_messages.id
    target text not null,
    state text not null default 'waiting' check (state in ('waiting', 'sent', 'failed')),
    attempts int not null default 0,
    due_at timestamptz not null default now(),   -- also the end of the lease of who is sending it
    created_at timestamptz not null default now(),
    finished_at timestamptz,
    reply text not null default ''               -- the last thing the next server said, or why there was none
);
create index forwards_due on forwards (due_at) where state = 'waiting';
create index forwards_inbound on forwards (inbound_id);

-- What was taken from mailboxes, so that nothing counts twice. Written with the mail; forgotten when it is old and no longer there.
create table mailbox_messages (
    mailbox text not null,                       -- its URL without what is secret
    uid text not null,                           -- POP3: UIDL; IMAP: UIDVALIDITY.UID
    digest bytea not null,                       -- SHA-256 of the message: servers renumber
    taken_at timestamptz not null default now(),
    primary key (mailbox, uid)
);
create index mailbox_messages_digest on mailbox_messages (mailbox, digest);

-- migrate: rollback
-- None: the schema only goes forward. A release that has to go back restores the backup made before it.
