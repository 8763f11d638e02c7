-- Copies of unsubscribes that are posted to a URL of the operator (mail.list_unsubscribe_to)
-- depends: 0019_parts_taken_at

-- migrate: apply

-- One row from the transaction of the unsubscribe until the receiver has answered 2xx; a few at any time.
create table unsubscribe_copies (
    id uuid primary key default gen_random_uuid(),     -- the receiver knows a repeated one by it
    body text not null,                                -- JSON, as it is posted
    created_at timestamptz not null default now(),
    due_at timestamptz not null default now(),
    attempts int not null default 0,
    reason text not null default '',                   -- why the last attempt failed
    given_up_at timestamptz
);
create index unsubscribe_copies_due on unsubscribe_copies (due_at) where given_up_at is null;

-- migrate: rollback
-- None: the schema only goes forward. A release that has to go back restores the backup made before it.
