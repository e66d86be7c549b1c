# No token's time is over.
package nsm

default valid = false

valid {
	segments := object.get(input, "path_segments", [])
	now := time.now_ns() / 1000000000
	fresh := [i |
		[_, claims, _] := io.jwt.decode(segments[i].token)
		is_number(claims.exp)
		claims.exp > now
	]
	count(fresh) == count(segments)
}
