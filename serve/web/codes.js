// Made by `python -m serve.wire.codes`, whose table this is.
export const FATES = {
  bad_request: {"close": 1008, "status": 400, "kept": false, "resume": false, "again": false},
  unauthorized: {"close": 1008, "status": 401, "kept": false, "resume": false, "again": false},
  unsupported_size: {"close": 1008, "status": 422, "kept": false, "resume": false, "again": false},
  bad_frame: {"close": 1007, "status": 400, "kept": false, "resume": false, "again": false},
  at_capacity: {"close": 1013, "status": 503, "kept": true, "resume": true, "again": false},
  too_slow: {"close": 1008, "status": 408, "kept": true, "resume": false, "again": false},
  draining: {"close": 1012, "status": 503, "kept": true, "resume": true, "again": true},
  internal: {"close": 1011, "status": 500, "kept": true, "resume": true, "again": false},
};
