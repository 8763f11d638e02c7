-- Conversions that trackers report server to server, and what their parameters are called
-- depends: 0014_tag_values

-- migrate: apply

alter table campaigns add column track_conversions boolean not null default false;   -- clicks carry a click id

create table s2s_settings (
    user_id bigint primary key references users,
    parameter text not null default 'click_id',        -- of the click id, in links and in postbacks
    value_parameter text not null default 'value',
    unit text not null default '',                     -- where a postback names none
    channel text not null default ''
);

-- Insert-only. One row per click id and transaction, however often its postback is sent.
create table conversions (
    id bigint generated always as identity primary key,
    campaign_id bigint not null references campaigns on delete cascade,
    number int not null,                               -- of the recipient
    at timestamptz not null default now(),
    value numeric(20, 4) not null default 0,
    unit text not null default '',
    channel text not null default '',
    transaction text not null default '',
    unique (campaign_id, number, transaction)
);

-- migrate: rollback
-- None: the schema only goes forward. A release that has to go back restores the backup made before it.
