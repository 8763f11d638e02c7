-- Custom header fields by mail class and delivery server
-- depends: 0003_tracking

-- migrate: apply

create table custom_headers (
    id bigint generated always as identity primary key,
    user_id bigint not null references users,
    name text not null,
    value text not null,                         -- a template
    mail_classes text[] not null default '{}',   -- empty: all
    delivery_server_id bigint references delivery_servers,   -- null: all of the user's
    created_at timestamptz not null default now()
);
create index custom_headers_user on custom_headers (user_id, id);

-- [[name, value], ...] as they stood when the campaign was started; null: a draft, which takes those of now
alter table campaigns add column headers json;

-- migrate: rollback
-- None: the schema only goes forward. A release that has to go back restores the backup made before it.
