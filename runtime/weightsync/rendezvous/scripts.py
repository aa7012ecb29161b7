"""Lua of the ledger: each script is one compare-and-set that no other client can split.

Redis runs a script as a whole. Scripts take the session's key prefix as KEYS[1] and derive their keys from it; the
names are those of `weightsync.wire.Keys`. Those that change what is committed or who takes part raise the head first to
what the caller has witnessed, so that a ledger that came back empty never turns time back (failure modes 30, 50).
"""

from __future__ import annotations

_HELPERS = """
local prefix = KEYS[1]
local head = prefix .. 'head'

local function get(field) return tonumber(redis.call('HGET', head, field) or '0') end

local function now()
  local t = redis.call('TIME')
  return tonumber(t[1]) + tonumber(t[2]) / 1e6
end

local function text(seconds) return string.format('%.6f', seconds) end
"""

_PRELUDE = (
    _HELPERS
    + """
-- ARGV[1..5]: what the caller knows: committed epoch and version, newest epoch, highest version and attempt tried.
local function raise_head()
  local epoch, version = tonumber(ARGV[1]), tonumber(ARGV[2])
  local held_epoch, held = get('version_epoch'), get('version')
  if epoch > held_epoch or (epoch == held_epoch and version > held) then held_epoch, held = epoch, version end
  redis.call('HSET', head, 'version', held, 'version_epoch', held_epoch,
             'epoch', math.max(get('epoch'), epoch, tonumber(ARGV[3])),
             'published', math.max(get('published'), version, tonumber(ARGV[4])),
             'attempts', math.max(get('attempts'), tonumber(ARGV[5])))
end
raise_head()
"""
)

_HEAD_REPLY = """
return {get('epoch'), get('version'), get('version_epoch'), get('published')}
"""

RAISE_HEAD = _PRELUDE + _HEAD_REPLY

OPEN_EPOCH = (
    _PRELUDE
    + """
-- ARGV[6]: the epoch that the operator gave, or 0.
local wanted, known = tonumber(ARGV[6]), get('epoch')
if wanted == 0 then
  for _, member in ipairs(redis.call('HVALS', prefix .. 'members')) do
    local record = cjson.decode(member)
    known = math.max(known, record.epoch or 0, record.seen_epoch or 0)
  end
  wanted = known + 1
elseif wanted < known then
  return {'FENCED', known}
end
redis.call('HSET', head, 'epoch', wanted)
return {'OK', wanted}
"""
)

BEGIN_PUSH = (
    _PRELUDE
    + """
-- ARGV[6..12]: epoch, sequence, timeout, catch_up (0/1), floor version, the record's constant part, TTL.
local epoch, catch_up, floor = tonumber(ARGV[6]), ARGV[9] == '1', tonumber(ARGV[10])
if get('epoch') ~= epoch then return {'FENCED', get('epoch')} end
local version
if catch_up then
  if get('version_epoch') ~= epoch or (floor > 0 and get('version') ~= floor) then
    return {'NOTHING', get('version'), get('version_epoch')}
  end
  version = get('version')
else
  version = math.max(get('published'), floor) + 1
end
local attempt = get('attempts') + 1
local push_id = string.format('%d.%d.%d', epoch, version, attempt)
local deadline_at = now() + tonumber(ARGV[8])
redis.call('HSET', head, 'published', math.max(get('published'), version), 'attempts', attempt)
local key = prefix .. 'push:' .. push_id
redis.call('HSET', key, 'record', ARGV[11], 'epoch', epoch, 'version', version, 'attempt', attempt,
           'deadline_at', text(deadline_at), 'catch_up', ARGV[9], 'decision', 'OPEN', 'reason', '')
redis.call('EXPIRE', key, ARGV[12])
redis.call('SET', prefix .. 'current:' .. epoch, ARGV[7] .. ' ' .. push_id, 'EX', ARGV[12])
return {'OK', push_id, version, attempt, text(deadline_at)}
"""
)

DECIDE = (
    _PRELUDE
    + """
-- ARGV[6..10]: push id, decision wanted, reason, TTL, TTL of the stream. Answers the decision in force and its reason.
local key = prefix .. 'push:' .. ARGV[6]
local push = redis.call('HMGET', key, 'decision', 'reason', 'epoch', 'version', 'deadline_at', 'catch_up', 'repair')
if push[1] and push[1] ~= 'OPEN' then return {push[1], push[2]} end

local function refusal()
  if not push[1] then return 'the ledger does not know push ' .. ARGV[6] .. ': its Redis lost its data' end
  local epoch, version, late = tonumber(push[3]), tonumber(push[4]), now() - tonumber(push[5])
  if ARGV[7] == 'ABORT' then return ARGV[8] end
  local committed_epoch, committed = get('version_epoch'), get('version')
  if push[7] == '1' then -- a repair: a new trainer does not end it, a new version does
    if committed_epoch ~= epoch or committed ~= version then
      return string.format('version %d of epoch %d was committed meanwhile', committed, committed_epoch)
    end
  elseif get('epoch') ~= epoch then
    return string.format('epoch %d is in force, the push is of epoch %d', get('epoch'), epoch)
  end
  if late > 0 then return string.format('its deadline passed %.3f s before the commit', late) end
  if push[6] == '0' and (committed_epoch > epoch or (committed_epoch == epoch and committed >= version)) then
    return string.format('version %d of epoch %d is committed already', committed, committed_epoch)
  end
  return nil
end

local function tell(decision, reason)
  redis.call('HSET', key, 'decision', decision, 'reason', reason)
  -- Whoever blocks on this stream wakes up; one that comes later finds the entry.
  redis.call('XADD', key .. ':decided', '*', 'decision', decision, 'reason', reason)
  redis.call('EXPIRE', key .. ':decided', ARGV[9])
  redis.call('XADD', key .. ':told', '*', 'decision', decision, 'reason', reason)
  redis.call('EXPIRE', key .. ':told', ARGV[10])
end

local reason = refusal()
if reason then
  tell('ABORT', reason)
  redis.call('EXPIRE', key, ARGV[9])
  return {'ABORT', reason}
end
tell('COMMIT', '')
if push[6] == '0' then redis.call('HSET', head, 'version', push[4], 'version_epoch', push[3]) end
return {'COMMIT', ''}
"""
)

_CLAIM = (
    _PRELUDE
    + """
-- The claim of somebody else on a replica; one whose holder's lease is gone, or another incarnation's, does not stand.
local function claimed(replica, text)
  local known = redis.call('GET', prefix .. 'repair:' .. replica)
  if not known or known == text then return nil end
  local claim = cjson.decode(known)
  if redis.call('GET', prefix .. claim.lease) ~= claim.word then return nil end
  return known
end
"""
)

CLAIM_REPAIR = (
    _CLAIM
    + """
-- ARGV[6..8]: replica, claim, TTL in milliseconds.
local other = claimed(ARGV[6], ARGV[7])
if other then return {'TAKEN', other} end
redis.call('SET', prefix .. 'repair:' .. ARGV[6], ARGV[7], 'PX', ARGV[8])
return {'OK', ''}
"""
)

BEGIN_REPAIR = (
    _CLAIM
    + """
-- ARGV[6..13]: replica, claim, its TTL in milliseconds, epoch, version, timeout, the record's constant part, TTL.
local epoch, version = tonumber(ARGV[9]), tonumber(ARGV[10])
if get('version_epoch') ~= epoch or get('version') ~= version then return {'MOVED'} end
if claimed(ARGV[6], ARGV[7]) then return {'TAKEN'} end
redis.call('SET', prefix .. 'repair:' .. ARGV[6], ARGV[7], 'PX', ARGV[8])
local attempt = get('attempts') + 1
local push_id = string.format('%d.%d.%d', epoch, version, attempt)
local deadline_at = now() + tonumber(ARGV[11])
redis.call('HSET', head, 'attempts', attempt)
local key = prefix .. 'push:' .. push_id
redis.call('HSET', key, 'record', ARGV[12], 'epoch', epoch, 'version', version, 'attempt', attempt,
           'deadline_at', text(deadline_at), 'catch_up', '1', 'repair', '1', 'decision', 'OPEN', 'reason', '')
redis.call('EXPIRE', key, ARGV[13])
return {'OK', push_id, attempt, text(deadline_at)}
"""
)

RELEASE_REPAIR = """
-- ARGV: replica, claim.
local key = KEYS[1] .. 'repair:' .. ARGV[1]
if redis.call('GET', key) ~= ARGV[2] then return 0 end
return redis.call('DEL', key)
"""

ADD_TO_PUSH = """
-- ARGV: push id, field, JSON, TTL of the stream. A push that the ledger lost is not half recreated.
local key = KEYS[1] .. 'push:' .. ARGV[1]
if redis.call('HEXISTS', key, 'record') == 0 then return 0 end
redis.call('HSET', key, ARGV[2], ARGV[3])
redis.call('XADD', key .. ':told', '*', ARGV[2], ARGV[3])
redis.call('EXPIRE', key .. ':told', ARGV[4])
return 1
"""

_SHOW = """
-- A replica's status, JSON without updated_at, for the operator.
local function show(replica, status)
  local stamped = string.gsub(status, '}$', ',"updated_at":' .. text(now()) .. '}')
  return redis.call('HSET', prefix .. 'replicas', replica, stamped)
end
"""

JOIN = (
    _PRELUDE
    + _SHOW
    + """
-- ARGV[6..11]: replica, incarnation, joined_at (0: first join), member's JSON without joined_at, lease in milliseconds, and
-- the status to show, or nothing.
local joined_at = tonumber(ARGV[8])
local known = redis.call('HGET', prefix .. 'members', ARGV[6])
if known then
  local other = cjson.decode(known)
  if other.incarnation ~= ARGV[7] and joined_at > 0 and other.joined_at > joined_at then
    return {'REPLACED', other.incarnation}
  end
end
if joined_at == 0 then joined_at = now() end
local member = string.gsub(ARGV[9], '}$', ',"joined_at":' .. text(joined_at) .. '}')
redis.call('HSET', prefix .. 'members', ARGV[6], member)
redis.call('SET', prefix .. 'lease:replica:' .. ARGV[6], ARGV[7], 'PX', ARGV[10])
if ARGV[11] ~= '' then show(ARGV[6], ARGV[11]) end
return {'OK', text(joined_at), get('epoch'), get('version'), get('version_epoch'), get('published')}
"""
)

PUBLISH_STATUS = (
    _HELPERS
    + _SHOW
    + """
-- ARGV: replica, its status.
return show(ARGV[1], ARGV[2])
"""
)

LEAVE = """
-- ARGV: replica, incarnation.
local known = redis.call('HGET', KEYS[1] .. 'members', ARGV[1])
if not known or cjson.decode(known).incarnation ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[1] .. 'members', ARGV[1])
redis.call('HDEL', KEYS[1] .. 'replicas', ARGV[1])
redis.call('DEL', KEYS[1] .. 'lease:replica:' .. ARGV[1])
return 1
"""

PUBLISH_PUSH = """
-- ARGV: JSON, length to keep, push id. The first account of a push that is known stays: a retry after a lost answer, or the
-- coordinator of the next epoch, does not list it twice.
local list, key = KEYS[1] .. 'pushes', KEYS[1] .. 'push:' .. ARGV[3]
if redis.call('HEXISTS', key, 'summary') == 1 or redis.call('LINDEX', list, 0) == ARGV[1] then return 0 end
if redis.call('HEXISTS', key, 'record') == 1 then redis.call('HSET', key, 'summary', ARGV[1]) end
redis.call('LPUSH', list, ARGV[1])
redis.call('LTRIM', list, 0, tonumber(ARGV[2]) - 1)
return 1
"""
