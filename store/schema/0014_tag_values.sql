-- What the tags of users, user groups and opt-ins say
-- depends: 0013_dkim_verified

-- migrate: apply

alter table users add column group_id bigint not null default 0;   -- the operator's own number of a group; 0: in none

-- What a started campaign says of its user stays what it was
alter table campaigns
    add column user_email text,              -- null until it is started
    add column user_group_id bigint;

-- Merge data with the opt-in in front, so that fields of the list with these names win
create function with_opt_in(data json, ip inet, subscribed_at timestamptz) returns json language sql stable as $$
    select (
        '{"subscription_ip":"' || coalesce(host(ip), '') || '","subscription_date":"'
        || to_char(subscribed_at at time zone 'UTC', 'YYYY-MM-DD') || '"'
        || case when data::text ~ '^\s*\{\s*\}\s*$' then '}' else ',' || regexp_replace(data::text, '^\s*\{', '') end
    )::json
$$;

-- migrate: rollback
-- None: the schema only goes forward. A release that has to go back restores the backup made before it.
