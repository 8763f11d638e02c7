-- Followed links and opens: what a campaign wants, where its links lead, and who came
-- depends: 0002_dkim_keys

-- migrate: apply

alter table campaigns
    add column track_links boolean not null default false,
    add column track_opens boolean not null default false,
    add column utm_source text not null default '',
    add column utm_medium text not null default '';

-- Written when the campaign is started and never changed: link numbers in mail that was sent must keep their meaning.
create table campaign_links (
    campaign_id bigint not null references campaigns on delete cascade,
    link int not null,                       -- 1, 2, ... in the order of the HTML part
    url text not null,                       -- '': the link has merge tags and carries its address itself
    primary key (campaign_id, link)
);

-- Insert-only: opens and clicks, from the journals of the inbound processes (journal/visits).
create table events (
    campaign_id bigint not null,
    number int not null,                     -- of the recipient
    kind "char" not null check (kind in ('o', 'c')),
    link int not null default 0,             -- 0 for an open
    at timestamptz not null,
    bot text not null default '',            -- why we think no person did it: head, prefetch, agent, burst; '' = a person
    agent text not null default ''           -- User-Agent, cut
);
create index events_campaign on events (campaign_id, number);

-- migrate: rollback
-- None: the schema only goes forward.
