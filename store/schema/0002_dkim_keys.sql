-- DKIM keys
-- depends: 0001_first

-- migrate: apply

create table dkim_keys (
    id bigint generated always as identity primary key,
    user_id bigint not null references users,
    domain text not null,                         -- A-labels, lower case
    selector text not null,
    algorithm text not null check (algorithm in ('rsa-sha256', 'ed25519-sha256')),
    bits int not null,
    public_key bytea not null,                    -- what the DNS record says
    private_key_sealed bytea not null default '', -- PKCS #8 under AES-256-GCM, row id as associated data (S11)
    state text not null default 'waiting' check (state in ('waiting', 'active', 'retiring')),
    created_at timestamptz not null default now(),
    activated_at timestamptz,
    retired_at timestamptz,
    unique (user_id, domain, selector)
);
-- One key of a kind signs for a domain; this is also how an engine finds it
create unique index dkim_keys_active on dkim_keys (user_id, domain, algorithm) where state = 'active';

-- One row: raised by every change of an active key, so an engine asks one number whether to look again.
create table dkim_version (version bigint not null);
insert into dkim_version values (1);

-- migrate: rollback
-- None: the schema only goes forward. A release that has to go back restores the backup made before it.
