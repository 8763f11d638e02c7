-- The seed list: addresses that get a copy of every campaign
-- depends: 0011_attachments

-- migrate: apply

create table seeds (
    id bigint generated always as identity primary key,
    user_id bigint references users,         -- null: the campaigns of all users
    email text not null,
    email_key text not null,
    created_at timestamptz not null default now()
);
create unique index seeds_address on seeds (coalesce(user_id, 0), email_key);

-- migrate: rollback
-- None: the schema only goes forward. A release that has to go back restores the backup made before it.
